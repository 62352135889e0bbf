"""Generation and evaluation with a trained model whose sequence is split over a ring."""
