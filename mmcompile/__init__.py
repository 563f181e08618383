"""torch.compile backend that makes the prefill of vision-language models sparse.

    torch.compile(model, backend="mminference")

needs no import of this package: torch finds the backend by its entry point. Importing it adds what is here.
"""

from mmcompile.aoti_package import package
from mmcompile.architecture import Architecture
from mmcompile.check_bound import CheckWarning
from mmcompile.eager_attention import register_attention
from mmcompile.errors import BoundaryError, ExportError, MMCompileError, OptionError, TableError, UnsupportedSitesError
from mmcompile.export_program import export
from mmcompile.kernels.patterns import HeadPattern
from mmcompile.modality import ModalityBoundaries, bind
from mmcompile.model import compile
from mmcompile.options import Options
from mmcompile.passes.decide import Reason, SiteRecord
from mmcompile.pattern_search.search import search
from mmcompile.prefill import SiteStats, stats
from mmcompile.report import Report, explain
from mmcompile.tables import PatternTable
from mmcompile.text_prefill import TextPrefill, text_prefill
from mmcompile.transform_program import transform

__all__ = [
    "Architecture",
    "BoundaryError",
    "CheckWarning",
    "ExportError",
    "HeadPattern",
    "MMCompileError",
    "ModalityBoundaries",
    "OptionError",
    "Options",
    "PatternTable",
    "Reason",
    "Report",
    "SiteRecord",
    "SiteStats",
    "TableError",
    "TextPrefill",
    "UnsupportedSitesError",
    "bind",
    "compile",
    "explain",
    "export",
    "package",
    "register_attention",
    "search",
    "stats",
    "text_prefill",
    "transform",
]
