"""How Sphinx makes the site out of these pages: `make docs`."""

from sera_plugin import __version__

project = "sera_plugin"
release = __version__
html_title = f"sera_plugin {release}"

extensions = ["myst_parser"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3

# Messages and options stay as they are written, so that they can be searched for.
smartquotes = False

html_theme = "furo"
html_copy_source = False
html_use_index = False
# It would fetch the pages it found, which a browser does not do from disk.
html_show_search_summary = False
html_show_sphinx = False
html_show_copyright = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
