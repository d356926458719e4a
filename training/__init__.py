"""Training: text sources, packed batches, needle documents, and the Trainer that uses them."""
