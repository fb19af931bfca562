"""The only part that knows text and users: HTTP, tokenizer, admission, placement, streams, metrics. No torch here."""
