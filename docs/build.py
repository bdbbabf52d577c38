"""Build the site in `_docs/` from README, notebooks and the pages in this folder: `make docs`.

Nothing is executed: outputs stand in the notebooks, and the API is read from the package.
Links are those that work on GitHub; each is checked."""
import ast, re, shutil, sys
from dataclasses import dataclass
from pathlib import Path
from fastcore.nbio import mk_cell, read_nb, write_nb
from sphinx.cmd.build import build_main
import fastkd.all
from api import definitions, public_names, repository

root = Path(__file__).resolve().parent.parent
work,out = root/'_proc',root/'_docs'
pages = work/'pages'
# addresses of our own, which README needs on PyPI
site,pictures = 'https://fastkd.github.io/fastkd','https://raw.githubusercontent.com/fastkd/fastkd/main'

tutorials = ['pets','layers','text','tables','segmentation','labels','timm','pretrained','moving_teachers','cache','own_loss','several_gpus','comparing',
             'shipping']


def existing(*paths): return [p for p in paths if (root/p).exists()]

def tutorial_paths() -> list:
    "Tutorials in the order of the site, then those that it does not know."
    known = [f'nbs/tutorials/{name}.ipynb' for name in (*tutorials, 'results')]
    others = sorted(p.relative_to(root).as_posix() for p in (root/'nbs/tutorials').glob('*.ipynb'))
    return existing(*known[:-1]) + [p for p in others if p not in known]


# what the bar at the top shows, and the pages behind it; a page appears when its file does
sections = {
    'Start': existing('docs/quickstart.md', 'docs/coming_from.md'),
    'Choose': existing('docs/choose.md', 'docs/not_better.md'),
    'Papers': existing('docs/papers.md'),
    'Tutorials': tutorial_paths(),
    'API': sorted(p.relative_to(root).as_posix() for p in (root/'nbs').glob('0*.ipynb')),
    'Results': existing('nbs/tutorials/results.ipynb'),
    'Changelog': existing('CHANGELOG.md'),
    'Architecture': existing('ARCHITECTURE.md')}

def place(section, path) -> str:
    "Where the page of a source lies in the site."
    name = Path(path).name
    if section == 'API': return f"api/{re.sub('^[0-9a-z]+_', '', name)}"
    return f'tutorials/{name}' if section == 'Tutorials' else name.lower()

places = {'README.md': 'index.md'} | {path: place(name, path) for name,paths in sections.items() for path in paths}
urls = {Path(p).with_suffix('.html').as_posix(): path for path,p in places.items()}


def linked_file(
    target:str, # Of a link, without an anchor
    path:str # Of the file that it stands in
) -> str|None:
    "The file of the repository that a link means, existing or not; `None` for other people's addresses."
    if target.startswith(site): return urls.get(url := target.removeprefix(site).strip('/') or 'index.html', url)
    for own in (repository, pictures):
        if target.startswith(own): return target.removeprefix(own).strip('/')
    if ':' in target: return None
    file = (root/path).parent.joinpath(target).resolve()
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else target


code_block = r'(?ms)^(```.*?^```)'
# text, target and anchor of a link or a picture
link = re.compile(r'(\[[^\]]*\]\()([^)#\s]+)(#[^)\s]*)?(?=[\s)])')

def with_links(
    text:str, # Markdown
    path:str # Of its source
) -> str:
    "`text` with links to where the pages lie, and to GitHub for other files; pictures are copied. Sphinx complains of what does not exist."
    def replace(m):
        before,anchor,file = m[1],m[3] or '',linked_file(m[2], path)
        if file is None: return m[0]
        if file in places: return f'{before}/{places[file]}{anchor}'
        if not (root/file).exists(): return f'{before}/{file}{anchor}'
        if not file.endswith(('.png', '.svg', '.jpg')): return f'{before}{repository}/{file}{anchor}'
        (pages/file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root/file, pages/file)
        return f'{before}/{file}'
    parts = re.split(code_block, text)  # every second one is a block of code
    return ''.join(part if i%2 else link.sub(replace, part) for i,part in enumerate(parts))


def spelled(
    node # Of a syntax tree
) -> str:
    "The text that a string constant or an f-string gives, with `…` for what is filled in; empty for anything else."
    if isinstance(node, ast.JoinedStr): return ''.join(spelled(v) or '…' for v in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ''

def picture_text(
    cell, # That draws it
    heading:str # Of its section
) -> str:
    "What a picture shows, for those who do not see it: the titles in the code, else the heading of its section."
    titles = []
    for call in (n for tree in cell.parsed_() or [] for n in ast.walk(tree) if isinstance(n, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else ''
        given = [k.value for k in call.keywords if k.arg == 'title'] + (call.args[:1] if name in ('set_title','suptitle') else [])
        titles += filter(None, map(spelled, given))
    return f'{heading}: {"; ".join(titles)}' if titles else f'Figure: {heading}'


def themed(
    outputs:list # Of a cell
) -> list:
    "`outputs` in the style of the site: those of fastai and pandas know no dark theme. Outputs that hold nothing else are left out."
    for data in (o['data'] for o in outputs if 'data' in o):
        if 'text/html' not in data: continue
        data['text/html'] = re.sub('(?s)<style.*?</style>', '', data['text/html']).replace('class="fastprogress"', 'class="dataframe"').strip()
    return [o for o in outputs if o.get('data', {}).get('text/html') != '']


@dataclass
class Notebook:
    "A notebook of the repository, to be a page."
    path:str # In the repository

    def __post_init__(self):
        self.nb = read_nb(root/self.path)
        code = [c for c in self.nb.cells if c.cell_type == 'code']
        module = next((c.directives['default_exp'] for c in code if 'default_exp' in c.directives), None)
        self.module = module and f'fastkd.{module}'
        self.names = public_names(self.module, [c.source for c in code if 'export' in c.directives]) if module else {}

    def code_cells(self, cell, heading) -> list:
        "What the page shows of a code cell: of an exported one the API, with the source one click away."
        directives = cell.directives
        cell.remove_directives()
        if not directives.keys().isdisjoint(['hide', 'default_exp']): return []
        if directives.keys().isdisjoint(['export', 'exporti']):
            if directives.get('echo') == 'false': cell.metadata['tags'] = ['remove-input']
            cell.metadata['mystnb'] = {'image': {'alt': picture_text(cell, heading)}}
            cell.outputs = themed(cell.outputs)
            return [cell]
        defined = definitions(cell.source)
        if not defined: return []  # imports
        prompt = f"Source: {', '.join(defined)}"
        cell.metadata |= {'tags': ['hide-input'], 'mystnb': {'code_prompt_show': prompt, 'code_prompt_hide': prompt}}
        return [*(mk_cell(self.names[n].entry(), 'markdown') for n in defined if n in self.names), cell]

    def cells(self) -> list:
        "The cells of the page."
        shown,heading = [],''
        for cell in self.nb.cells:
            if cell.cell_type == 'code': shown += self.code_cells(cell, heading)
            else:
                headings = re.findall(r'(?m)^#+ (.*)', re.sub(code_block, '', cell.source))
                if headings: heading = re.sub('[`*$]', '', headings[-1])
                cell.source = with_links(cell.source, self.path)
                shown.append(cell)
        if self.module:
            about = f'Module `{self.module}`, exported from [{self.path}]({repository}/{self.path}).'
            shown.insert(1, mk_cell(f'```{{py:module}} {self.module}\n```\n\n{about}', 'markdown'))
        return shown

    def write(self):
        self.nb.cells = self.cells()
        self.nb.metadata['language_info'] = {'name': 'python', 'pygments_lexer': 'ipython3'}
        write_nb(self.nb, pages/places[self.path])


def opening(path) -> str:
    "The text of a page up to its second heading."
    text = next(c.source for c in read_nb(root/path).cells if c.cell_type == 'markdown') if path.endswith('.ipynb') else (root/path).read_text()
    return re.split(r'(?m)^##', text)[0].strip()

def title(path): return re.search(r'(?m)^# (.*)', opening(path))[1]

def summary(path) -> str:
    "What a page says of itself, in a sentence; empty if it starts with a section."
    text = opening(path).partition('\n')[2].strip().split('\n\n')[0].removeprefix('>')
    text = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', ' '.join(text.split()))
    return re.split(r'(?<=[.:]) (?=[A-Z])', text)[0]

def toctree(entries): return '\n'.join(['```{toctree}', ':hidden:', '', *entries, '```', ''])


def name_table(
    names # `PublicName`s
) -> str:
    "A line for each name."
    rows = [(f'{{py:obj}}`{n.name} <{n.full}>`', n.about.split('\n')[0].replace('|', r'\|')) for n in names]
    return '\n'.join(f"| {' | '.join(row)} |" for row in [('name', 'what it is'), ('---', '---'), *rows])

def api_index(paths) -> str:
    "Every public name in one line."
    notebooks = [Notebook(p) for p in paths]
    names = {id(n.value): n for nb in notebooks for n in nb.names.values() if not n.is_data}
    users = [names[id(o)] for name,o in vars(fastkd.all).items() if id(o) in names and name[0] != '_']
    parts = ['## fastkd.all', 'What `from fastkd.all import *` imports:', name_table(users)]
    for nb in notebooks: parts += [f'## [{nb.module}](/{places[nb.path]})', summary(nb.path), name_table(nb.names.values()) if nb.names else '']
    return '\n\n'.join(parts)


def section_entry(
    name:str, # As the bar at the top shows it
    paths:list # Of its pages
) -> str:
    "The entry of a section in the bar. A section of several pages gets a page that lists them."
    if len(paths) == 1: return f'{name} </{places[paths[0]]}>'
    page = pages/name.lower()/'index.md'
    page.parent.mkdir(exist_ok=True)
    listed = '\n'.join(f'- [{title(p)}](/{places[p]})' + f': {summary(p)}'.removesuffix(': ') for p in paths)
    entries = [f'/{places[p]}' for p in paths]
    page.write_text(f"# {name}\n\n{api_index(paths) if name == 'API' else listed}\n\n{toctree(entries)}")
    return f'{name} </{page.relative_to(pages).as_posix()}>'


def write_pages():
    "Write every page, for Sphinx to read."
    for path,staged in places.items():
        (pages/staged).parent.mkdir(parents=True, exist_ok=True)
        if path.endswith('.ipynb'): Notebook(path).write()
        else: (pages/staged).write_text(with_links((root/path).read_text(), path))
    entries = [section_entry(name, paths) for name,paths in sections.items() if paths]
    with (pages/'index.md').open('a') as f: f.write('\n' + toctree(entries))


if __name__ == '__main__':
    for folder in (work, out): shutil.rmtree(folder, ignore_errors=True)
    write_pages()
    # -W: a warning, such as a link that leads nowhere, is an error, after all of them have been shown
    status = build_main(['-W', '--keep-going', '-q', '-c', str(root/'docs'), '-d', str(work/'doctrees'), str(pages), str(work/'html')])
    if (work/'html').exists(): shutil.move(work/'html', out)
    sys.exit(status)
