"""What both ends agree on, byte for byte: layouts, codecs, messages, specs and errors."""
