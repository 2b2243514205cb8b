"""Attribution graphs: how a prompt becomes an answer, what validates the picture, and the page that shows it."""
