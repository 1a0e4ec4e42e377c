"""The profile of a network: what each block costs, takes and could take, and what would make it cheaper."""

from fastblocks.bench.profile.run import REST, profile

__all__ = ["REST", "profile"]
