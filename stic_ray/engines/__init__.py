"""The vision-language model behind one small protocol."""
