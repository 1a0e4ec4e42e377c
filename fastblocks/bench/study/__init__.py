"""The papers' claims, measured on the machine at hand.

Each claim is a record (`claim.Claim`): it measures, and puts what it found into words, tables and a picture. Where a
claim says "holds", a comparison of measured numbers has said so.
"""

from fastblocks.bench.study.run import CLAIMS, study

__all__ = ["CLAIMS", "study"]
