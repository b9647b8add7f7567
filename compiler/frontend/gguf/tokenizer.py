def tokenizer_files(metadata, where):
    return ({}, ())
