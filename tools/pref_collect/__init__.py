"""data: collect human preferences and ratings in a web page, judge their quality and export them."""
