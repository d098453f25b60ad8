"""Other libraries' frozen parts behind three small protocols: image encoder, text encoder, language model."""
