"""What a run leaves for others, and how it gets there: docs/sharing.md.

- `card`       what SeRA did, as the README.md of a model
- `names`      what a run, its model and its data are called
- `messages`   token ids back to the messages that a chat template was given
- `pairs`      the pairs that were ranked and made, as a dataset with a card
- `plan`       what of it goes where on the Hugging Face hub, policies as revisions
- `hub`        and puts it there
- `command`    the command line
"""
