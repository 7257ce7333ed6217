"""What a pruned model is worth: perplexity, zero-shot tasks, speed, and studies of runs side by side."""
