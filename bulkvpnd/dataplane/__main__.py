from gevent import monkey

monkey.patch_all()

from bulkvpnd.dataplane.worker import main  # noqa: E402  (sockets must be patched before they are imported)

main()
