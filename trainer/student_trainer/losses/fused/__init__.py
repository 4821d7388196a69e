"""Triton kernels for everything between the head's products, on GPUs. `passes` does the same on a CPU, and is the
reference.

Open `launch` first. Nothing here is imported where no kernel runs, since Triton is not available everywhere.

    launch       teacher rows as the kernels read them, and the launches
    normalise    normalisers, and terms on a support or the label        compare        terms over the whole vocabulary
    gradient     the gradient of all terms                               row_functions  what the kernels have in common
    divergences  one bucket of each kind
"""
