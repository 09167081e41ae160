"""Complete systems outside the heart of a loss library, one module each, imported by name.

Without a promise of stability; nothing of pyloss imports this package.
"""
