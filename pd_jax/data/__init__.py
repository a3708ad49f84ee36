"""Where samples come from: web text for pretraining, questions grouped by context for finetuning and evaluation."""
