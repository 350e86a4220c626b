"""corpora -> tokenizer -> packed token shards -> resumable windows."""
