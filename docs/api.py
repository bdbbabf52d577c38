"The public names of fastkd as entries of the site: signature, docstring, arguments, methods."
import ast, importlib, inspect, re
from dataclasses import dataclass
from functools import cached_property
from types import NoneType
from fastai.callback.core import Callback, event
from fastcore.basics import listify
from fastcore.docments import docments
from nbdev.doclinks import patch_name
import fastkd.all  # whatever patches methods in is imported before a class is shown

repository = 'https://github.com/fastkd/fastkd/blob/main'
Empty = inspect.Parameter.empty
fence = '`'*6   # longer than any fence in a docstring; one fewer for the methods within a class
events = set(vars(event))


class Shown:
    "A default value whose `repr` is `text`"
    def __init__(self, text): self.text = text
    def __repr__(self): return self.text


def value_text(
    o # A default value, a type, or an annotation
) -> str:
    "`o` as one would write it; objects without such a form are `...`."
    if isinstance(o, str): return repr(o)
    text = getattr(o, '__name__', None) or repr(o)
    return text if re.match(r'[\w\[({.+-]', text) else '...'


def type_text(
    anno, # An annotation
    default # Of the same argument
) -> str:
    "`anno` as one would write it. An annotation that fastcore took from the default `None` says nothing."
    if anno is Empty or (anno is NoneType and default is None): return ''
    return anno if isinstance(anno, str) else anno.__name__ if isinstance(anno, type) else str(anno)


def signature(
    o # A function or a class
) -> str:
    "Arguments with their defaults; the types stand in the table. Events, which every callback of fastai takes as arguments, are left out."
    def shown(p): return p.replace(annotation=Empty, default=p.default if p.default is Empty else Shown(value_text(p.default)))
    sig = inspect.signature(o)
    args = [shown(p) for name,p in sig.parameters.items() if name != 'self' and name not in events]
    return str(sig.replace(parameters=args, return_annotation=Empty))


def argument_table(
    o # A function or a class
) -> str:
    "A table of arguments from their docments, empty if there are none."
    args = docments(o, full=True)
    if not any(a.docment for a in args.values()): return ''
    def code(text): return f'`{text}`'.replace('|', r'\|') if text else ''
    rows = [['argument', 'type', 'default', 'meaning']]
    for name,a in args.items():
        if name == 'self' or (name == 'return' and (inspect.isclass(o) or (a.anno is Empty and not a.docment))): continue
        default = '' if a.default is Empty else value_text(a.default)
        about = ' '.join((a.docment or '').split()).replace('|', r'\|')
        rows.append([name.replace('return', '*returns*'), code(type_text(a.anno, a.default)), code(default), about])
    if len(rows) == 1: return ''
    columns = [c for c in zip(*rows) if any(c[1:])]  # those that say something
    return '\n'.join(f"| {' | '.join(row)} |" for row in zip(*((c[0], '---', *c[1:]) for c in columns)))


def docstring(
    o # Anything
) -> str:
    "The docstring of `o` itself, not an inherited one; empty if a namedtuple or a dataclass only repeats its signature there."
    doc = inspect.cleandoc(getattr(o, '__doc__', None) or '').split('\n\nArguments:')[0]  # which `fastkd.all` adds; here they are a table
    return '' if inspect.isclass(o) and doc.startswith(f'{o.__name__}(') else doc


def entry(
    kind:str, # Of Sphinx's Python domain: 'class', 'function', 'method', ...
    head:str, # Name and arguments
    body:list, # Parts in Markdown
    around:str, # The fence
    **options # Of the directive
) -> str:
    "An entry of the API."
    options = [f':{k.replace("_", "-")}: {v}'.rstrip() for k,v in options.items()]
    return '\n'.join([f'{around}{{py:{kind}}} {head}', *options, '', '\n\n'.join(filter(None, body)), around])


def function_of(
    o # A function, or what was made of one: a property, a class method, a function that remembers its results
):
    "The function itself; anything else as it is."
    if isinstance(o, property): return o.fget
    if isinstance(o, cached_property): return o.func
    return inspect.unwrap(getattr(o, '__func__', o), stop=lambda f: hasattr(f, '__signature__'))


def method_entry(
    cls:type, # A class of the package
    name:str # Of one of its own attributes
) -> str:
    "The entry of a method or property of `cls`; empty for attributes that are not documented, and for the events of a callback."
    o = vars(cls)[name]
    f = function_of(o)
    is_event = name in events and issubclass(cls, Callback)
    if name.startswith('_') or is_event or not inspect.isfunction(f) or not docstring(f): return ''
    if isinstance(o, (property, cached_property)): return entry('property', name, [docstring(f)], fence[1:], no_contents_entry='')
    return entry('method', name + signature(f), [docstring(f), argument_table(f)], fence[1:], no_contents_entry='')


@dataclass
class PublicName:
    "A name in the `__all__` of a module."
    module:str # Its full name
    name:str # As in the module
    comment:str = '' # What its source says above it, after `#:`

    @property
    def full(self): return f'{self.module}.{self.name}'
    @property
    def value(self): return function_of(vars(importlib.import_module(self.module))[self.name])
    @property
    def is_data(self): return not (inspect.isclass(self.value) or inspect.isfunction(self.value))

    @property
    def about(self):
        "Its docstring; of data the comment above them, or their own title."
        return (not self.is_data and docstring(self.value)) or self.comment or getattr(self.value, '__dict__', {}).get('title', '')

    def entry(self) -> str:
        "Its entry in Markdown; a class has its methods with it, those too that other cells or modules patch in."
        o = self.value
        if self.is_data: return entry('data', self.name, [self.about], fence, module=self.module)
        if inspect.isclass(o) and issubclass(o, Exception): return entry('exception', self.name, [self.about], fence, module=self.module)
        methods = [method_entry(o, n) for n in vars(o)] if inspect.isclass(o) else []
        kind = 'class' if inspect.isclass(o) else 'function'
        return entry(kind, self.name + signature(o), [self.about, argument_table(o), *methods], fence, module=self.module)


def definitions(
    source:str # Of a cell
) -> dict:
    "`{name: the comment above it}` of all that `source` defines; methods that it patches in are called `Class.method`."
    lines,found = source.splitlines(),{}
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)): names = listify(patch_name(node))
        elif isinstance(node, ast.Assign):
            names = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)]
        else: continue
        above = lines[node.lineno - 2].strip() if node.lineno > 1 else ''
        found |= dict.fromkeys(names, above[2:].strip() if above.startswith('#:') else '')
    return found


def public_names(
    module:str, # Its full name
    sources # Of its notebook's exported cells
) -> dict:
    "`{name: PublicName}` of a module, in the order of its notebook."
    names = importlib.import_module(module).__all__
    found = {n: PublicName(module, n, about) for source in sources for n,about in definitions(source).items() if n in names}
    if missing := set(names) - set(found): raise ValueError(f"{', '.join(missing)} of {module}.__all__: defined in no exported cell of its notebook.")
    return found
