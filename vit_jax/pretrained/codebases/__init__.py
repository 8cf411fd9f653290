"""Google's code, timm and transformers: their names, layouts, settings and files."""
