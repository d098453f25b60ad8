"""Records, formats, transforms, conversation templates, packing, shards and the feature cache."""
