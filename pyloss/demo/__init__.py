"""The main job of pyloss: `python -m pyloss.demo`, which is what `make demo` runs."""
