"""Operations other than attention for which several libraries have fused kernels.

operations.py has one signature for each operation, libraries.py which library supports it, and
choose_libraries.py chooses the libraries of a run for ``--fused-operations``.
"""
