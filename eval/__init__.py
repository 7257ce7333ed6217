"""What a pruned model is worth: perplexity."""
