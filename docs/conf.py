"Settings of Sphinx for the pages that `build.py` prepares."
import ast, importlib, inspect, re
from pathlib import Path
from docutils import nodes
from latex2mathml.converter import convert
from sphinx import addnodes
import fastkd
from api import function_of, repository

project,author,copyright = 'fastkd','the fastkd developers','the fastkd developers'
version = release = fastkd.__version__
language = 'en'
extensions = ['myst_nb', 'sphinx.ext.linkcode', 'sphinx_copybutton']

nb_execution_mode = 'off'                # outputs stand in the notebooks
nb_render_markdown_format = 'gfm'        # outputs in Markdown are tables
nb_merge_streams = True
myst_enable_extensions = ['dollarmath', 'amsmath']
myst_dmath_double_inline = True          # `$$` within a paragraph, as Jupyter shows it
myst_heading_anchors = 4                 # links such as `results.ipynb#cats-and-dogs`
nitpicky = True                          # a name that has no entry is an error
add_module_names = False
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = 'hide'

html_theme = 'pydata_sphinx_theme'
html_title = 'fastkd'
html_static_path = ['_static']
html_css_files = ['site.css']
html_favicon = '_static/favicon.svg'
html_math_renderer = 'mathml'
html_copy_source = html_show_sourcelink = html_use_index = html_domain_indices = False  # the page of the API is the index
html_context = {'default_mode': 'auto'}
html_theme_options = dict(
    github_url='https://github.com/fastkd/fastkd', logo={'text': 'fastkd'}, header_links_before_dropdown=8, navbar_align='left', show_toc_level=2,
    secondary_sidebar_items=['page-toc'], footer_start=['copyright'], footer_end=[], primary_sidebar_end=[], search_bar_text='Search fastkd')


def linkcode_resolve(domain, info):
    "The lines on GitHub that define an entry of the API."
    o = module = importlib.import_module(info['module'])
    for name in info['fullname'].split('.'): o = inspect.getattr_static(o, name)
    o = function_of(o)
    try: file,line = inspect.getsourcefile(o),inspect.getsourcelines(o)[1]
    except (TypeError, OSError):  # data, and classes that a call makes, such as a `namedtuple`
        assigned = [n for n in ast.parse(inspect.getsource(module)).body if isinstance(n, ast.Assign)]
        file,line = module.__file__,next(n.lineno for n in assigned if info['fullname'] in map(ast.unparse, n.targets))
    return f'{repository}/{Path(file).relative_to(Path(fastkd.__file__).parent.parent).as_posix()}#L{line}'


def link_targets(env, docname) -> dict:
    """`{name: entry of the API}` for the names that the page may mention.

    It is that of the page's own module, else the only one of that name. The command's functions, whose names are everyday words, count
    on their own page only."""
    objects = env.get_domain('py').objects
    modules = {name for name,o in objects.items() if o.objtype == 'module'}
    found,own = {},{}
    for full,o in objects.items():
        module = max((m for m in modules if full.startswith(f'{m}.')), key=len, default='')
        name = full.removeprefix(f'{module}.')
        if o.docname == docname: own[name] = o
        elif module == 'fastkd.cli': continue
        found[name] = None if name in found else o
        found[full] = o
    callback = 'KnowledgeDistillationCallback.'
    found |= {name.replace(callback, 'kd.'): o for name,o in found.items() if name.startswith(callback)}
    return {name: o for name,o in (found | own).items() if o}


def ancestors(node) -> list: return [node.parent, *ancestors(node.parent)] if node.parent else []

def link_names(app, doctree, docname):
    """In running text, a public name in backticks becomes a link to its entry; `SoftTarget(T=4)` counts as `SoftTarget`.

    The arguments of an entry are not links in it, whatever else has their name."""
    targets = link_targets(app.env, docname)
    for literal in list(doctree.findall(nodes.literal)):
        name = re.fullmatch(r'([\w.]+)(\(.*\))?', literal.astext())
        entry = name and targets.get(name[1])
        above = ancestors(literal)
        if not entry or any(isinstance(a, (nodes.title, nodes.reference, addnodes.desc_signature)) for a in above): continue
        arguments = [n.astext() for a in above if isinstance(a, addnodes.desc) for n in a[0].findall(addnodes.desc_sig_name)]
        if name[1] in arguments: continue
        uri = app.builder.get_relative_uri(docname, entry.docname) + f'#{entry.node_id}'
        literal.replace_self(nodes.reference('', '', literal.deepcopy(), internal=True, refuri=uri))


def visit_math(self, node):
    "MathML, which browsers show by themselves: MathJax would have to be downloaded."
    display = isinstance(node, nodes.math_block)
    math = convert(node.astext(), display='block' if display else 'inline')
    math = re.sub('(<mi>[a-z]{2,}</mi>)(?!<mo)', r'\1<mspace width="0.17em"/>', math)  # as after the log in `log p`
    math = math.replace('<mo accent="true">&#x02015;</mo>', '<mo class="overline"></mo>')  # few fonts stretch that line; the style draws it
    self.body.append(f'<div class="math">{math}</div>' if display else math)
    raise nodes.SkipNode


def setup(app):
    app.add_html_math_renderer('mathml', inline_renderers=(visit_math, None), block_renderers=(visit_math, None))
    app.connect('doctree-resolved', link_names)
