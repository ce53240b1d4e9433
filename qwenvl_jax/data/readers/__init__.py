"""Readers of public data in the formats that it is published in.

A reader (`fields.Reader`) is a frozen description of what lies in a download
folder. It has either `records(root)` or, where the data comes in parts,
`parts(root)` and `read(part)`. They yield `records.Record`s
whose images are bytes, or paths that `images_in(root)` resolves, and a
`BadRecordError` for each record that cannot be used.
"""
