"""Pure tensor functions. Read ``merge`` first: it is the algebra everything else stands on."""
