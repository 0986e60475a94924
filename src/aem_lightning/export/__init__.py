"""A run's episodes and curves in the formats that other libraries read."""

from aem_lightning.export.chats import Chats, chat_reader
from aem_lightning.export.rows import FORMS, rows_of

__all__ = ["FORMS", "Chats", "chat_reader", "rows_of"]
