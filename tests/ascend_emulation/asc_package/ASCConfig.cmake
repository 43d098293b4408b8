# Stands in for CANN's package ASC, which brings the language of that name: its compiler notes how it was
# called, and makes an empty object.
list(APPEND CMAKE_MODULE_PATH ${CMAKE_CURRENT_LIST_DIR})
