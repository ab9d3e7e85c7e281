"""Language models: loading, chat tokens, sampling."""
