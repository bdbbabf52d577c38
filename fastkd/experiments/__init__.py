"""Comparisons of methods over several seeds, and what their differences are worth"""
from ..methods import Method, method
from .compare import compare
from .recipes import Fit, Parts, Recipe, find_recipe
from .records import Results
from .reports import caption, chart, curves, epochs_to_baseline, markdown, table

__all__ = ['Method', 'method', 'compare', 'Fit', 'Parts', 'Recipe', 'find_recipe', 'Results',
           'caption', 'chart', 'curves', 'epochs_to_baseline', 'markdown', 'table']
