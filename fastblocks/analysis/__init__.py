"""What networks cost, counted: multiply-adds, memory traffic, the roofline, design guidelines. It needs torch alone."""

from fastblocks.analysis.cost import Operator, Product, count
from fastblocks.analysis.guidelines import Advice, Rates, advise
from fastblocks.analysis.roofline import Bound, attainable, bound

__all__ = ["Advice", "Bound", "Operator", "Product", "Rates", "advise", "attainable", "bound", "count"]
