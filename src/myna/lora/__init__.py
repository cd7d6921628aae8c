"""LoRA: which layers are adapted, what the adapter starts as, and how it is kept in a folder.

`targets` answers which linear layers a setting names, `initial` fills the first values of A and B,
`inject` puts the adapter into a model through peft, `adapter_file` writes and reads it.
"""
