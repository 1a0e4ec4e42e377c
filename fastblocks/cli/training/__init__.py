"""What `fastblocks train` is made of: pictures, processes, the loop over steps, checkpoints, curves, progress."""
