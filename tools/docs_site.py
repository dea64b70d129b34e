"""What MkDocs does beside rendering docs/ (hooks of mkdocs.yml): pages written from the code, pages from elsewhere, pages nobody listed."""
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = {"model_zoo.md": "model_zoo/README.md", "changelog.md": "CHANGELOG.md"}
API, COMMANDS = "<!-- the public API is put here -->", "<!-- the commands are put here -->"


def on_files(files, config):
    """Add the pages that lie outside of docs/."""
    from mkdocs.structure.files import File

    for name, source in ELSEWHERE.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_nav(nav, config, files):
    """Put pages that mkdocs.yml does not name under "More", so that a new page is never lost."""
    from mkdocs.structure.nav import Section

    listed = {page.file for page in nav.pages}
    unlisted = sorted((file for file in files.documentation_pages() if file not in listed), key=lambda file: file.src_uri)
    if unlisted:
        section = Section("More", [file.page for file in unlisted])
        for page in section.children:
            page.parent = section
        nav.items.append(section)
        nav.pages.extend(section.children)
    return nav


def on_page_markdown(markdown, page, config, files):
    """Fill in what is generated."""
    if API in markdown or COMMANDS in markdown:
        sys.path.insert(0, str(ROOT / "tools"))  # here, because MkDocs takes back what a hook's module does to it
        import api_reference

        markdown = markdown.replace(API, api_reference.public_api()) if API in markdown else markdown.replace(COMMANDS, api_reference.commands())
    return re.sub(r"<!-- (?:needs|test): .*?-->\n", "", markdown)  # notes for tests/docs
