# Plays the part of FreeBSD's bsd.port.mk and Uses/python.mk that comes after the wheel, for a port
# with USE_PYTHON=autoplist pep517: install the wheel into STAGEDIR, run post-install, compress the
# manual pages, and write the list of the package's files.  Source: these two files of the ports.
#
# The caller gives WHEEL, WRKDIR, PYTHON_CMD and PYTHON_VER.

PREFIX=			/usr/local
STAGEDIR=		${WRKDIR}/stage
WRKSRC=			${WRKDIR}/${PORTNAME}-${DISTVERSION}
TMPPLIST=		${WRKDIR}/.PLIST.mktmp
PYTHON_SITELIBDIR=	${PREFIX}/lib/python${PYTHON_VER}/site-packages
PYTHON_PKGNAMEPREFIX=	py${PYTHON_VER:S/.//}-
PY_FLAVOR=		py${PYTHON_VER:S/.//}
_PYTHONPKGLIST=		${WRKDIR}/.PLIST.pymodtmp

MKDIR=			mkdir -p
MV=			mv
REINPLACE_CMD=		sed -i.bak
STRIP_CMD=		strip

RECORD=			${STAGEDIR}${PYTHON_SITELIBDIR}/${PORTNAME}-${DISTVERSION}.dist-info/RECORD

stage:
	# FreeBSD's directories of the system are there before the port installs.
	${MKDIR} ${STAGEDIR}${PREFIX}/bin ${STAGEDIR}/var/db
	${PYTHON_CMD} -m installer --destdir ${STAGEDIR} --prefix ${PREFIX} ${WHEEL}
	sed -e 's|,.*||' -e '/\.pyc$$/d' -e 's|^|${PYTHON_SITELIBDIR}/|' \
	    -e 's|^${PYTHON_SITELIBDIR}/../../../||' ${RECORD} > ${_PYTHONPKGLIST}
	cd ${STAGEDIR}${PREFIX} && find lib -name '*.pyc' >> ${_PYTHONPKGLIST}
	${.MAKE} post-install
	find ${STAGEDIR}${PREFIX}/share/man -type f -exec gzip -n {} +
	cp pkg-plist ${TMPPLIST}
	sed -e 's|^${PREFIX}/||' -e 's|^\(share/man/.*\.[0-9]\)$$|\1.gz|' ${_PYTHONPKGLIST} \
	    >> ${TMPPLIST}
