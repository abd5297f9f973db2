"""The only room that touches ``ds_*`` attributes and DeepSpeed internals."""
