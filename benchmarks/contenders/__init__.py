"""What is compared, and on what: cases, the losses of logits, of a linear layer, of shards."""
