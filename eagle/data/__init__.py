"""What people bring -> messages -> tokens and loss mask.

json_file          records of JSON arrays and JSON Lines by index, without loading the file
cleaning           a ShareGPT record -> messages: what is mended, what is left out and why
chat_template      which template a model speaks
loss_mask          messages -> tokens, and which of them are the assistant's
tokens             the conversations of a whole job, encoded in all cores
viewer             a look at what is trained on
prompts            prompts to measure with
sharegpt           step 2: other formats -> ShareGPT
"""
