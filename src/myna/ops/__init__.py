"""Operations: tensors to tensors, each with its own backward, knowing no model and no data format.

Every file owns one operation and its derivation. Which layer calls it is `models`' and `lora`'s
business; how rows become the tensors that enter is `data`'s.
"""
