"""``eaft-ext inspect``: which tokens of a text EAFT mutes, as a model sees them."""
