"""Parts of tools/train_embedded.py: the corpus, the tokenizer, the model, its training, evaluation and export.

Who calls it: tools/train_embedded.py. Test: pytest tests/null/test_train_embedded.py
"""
