"""Data of a run: sources, mixture, packing. `settings` is light; `loader` is where the rest is put together.

`main` builds a `loader.BatchSource`; the loop reads a `stream.BatchStream`; `evaluator` asks for `held_out` batches.
"""
