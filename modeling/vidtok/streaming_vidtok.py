"""VidTok from file to file in constant memory."""


class VidTokFilesMixin:
    pass
