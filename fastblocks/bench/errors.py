"""What measuring raises."""

from __future__ import annotations

__all__ = ["BenchError"]


class BenchError(Exception):
    """Something that whoever asked can mend: a name, a path, a missing package. The message is one line."""
