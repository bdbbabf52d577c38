"""Comparisons of methods over several seeds, and what their differences are worth"""
from ..methods import Method, method
from .compare import compare, run_recipe
from .recipes import Fit, Parts, Recipe, find_recipe
from .records import Results, Run
from .reports import Runs, caption, chart, curves, epochs_to_baseline, markdown, table

__all__ = ['Method', 'method', 'compare', 'run_recipe', 'Fit', 'Parts', 'Recipe', 'find_recipe', 'Results', 'Run', 'Runs',
           'caption', 'chart', 'curves', 'epochs_to_baseline', 'markdown', 'table']
