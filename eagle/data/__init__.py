"""What people bring -> messages -> tokens and loss mask.

reader             the records of a file or folder, by index, whichever kind of file it is
record_file          what all of them have in common, and several read as one
json_file            JSON arrays and JSON Lines, without loading them
parquet_file         Parquet files, without loading them
arrow_file           Arrow files, without loading them
folder               which files of a folder hold its records
cleaning           a record -> messages: the one reader of conversations; what is mended, what is left out and why
chat_template      which template a model speaks (templates/: the built-in ones)
template_variables what a template asks for beside the conversation, and what a user says to it
reasoning          where a reply's reasoning begins and ends
rendering          messages -> text, and which of its characters are the assistant's
loss_mask          messages -> tokens, and which of them are the assistant's
rows               messages -> the rows that are trained, each reply behind the prompt that a server sends
token_source       a record -> tokens: a conversation by those above, or tokens already
tokens             the conversations of a whole job, encoded in all cores
mixture            several paths and their weights: which conversations are used, in which order
viewer             a look at what is trained on
prompts            prompts to measure with (default_prompts.jsonl: ours)
sharegpt/          step 2: other formats -> ShareGPT
"""
