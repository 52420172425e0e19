"""Applications on tierwise; they use its SDK only."""
