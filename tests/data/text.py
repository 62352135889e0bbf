"""The text that the small test tokenizer is trained on."""

TEXT = '''def fibonacci(n):
    """The first n numbers, each the sum of the two before it."""
    a, b = 0, 1
    for _ in range(n):
        yield a
        a, b = b, a + b

'''
