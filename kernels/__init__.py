"""Triton kernels, one module per operation: private kernels, and a `launch` that allocates and checks nothing.

What several modules share, or would make one too long, is in `common`.
"""

if __name__ != "fastdet.kernels":
    raise ImportError(
        f"this folder was imported as {__name__!r}: it is the package `fastdet.kernels`, reached through the link "
        "fastdet/kernels; write `from fastdet.kernels import nms` (a bare `kernels` is another project's name)"
    )
