"""The commands of `toast`, a file each; `toast.cli` puts them together.

All of them are imported whenever `toast` is called, so that it can list their options. What takes long to
import (torch, transformers, timm) a command imports where it needs it, within its function: that keeps
`toast --help`, and the message about a mistyped option, to a fraction of a second.
"""
