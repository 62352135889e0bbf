"""Operations other than attention for which several libraries have fused kernels.

operations.py has one signature for each operation, support.py which library supports it, and
choice.py chooses the libraries of a run for ``--fused-operations``.
"""
